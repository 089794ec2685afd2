"""The Llama with SSA attention on megatron-core's GPTModel. Reading order: spec, llama, attention, alignment, init, sharding."""
