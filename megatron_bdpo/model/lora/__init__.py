"""Low-rank adapters beside Megatron's linear layers, in the shapes and the format of PEFT."""
