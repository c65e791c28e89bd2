"""What happens beside a step, each in a file of its own: see ``callback.Callback``, and docs/callbacks.md."""
