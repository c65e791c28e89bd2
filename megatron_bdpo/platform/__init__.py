"""What ties us to one version of Megatron: version checks, the CPU emulation, the seams we replace.

Every monkey-patch of the project lives in this package, each with its reason.
"""
