"""What happens beside a step, each in a file of its own: see ``base.Callback``, and docs/callbacks.md."""
