"""The Llama with SSA attention on megatron-core's GPTModel. Reading order: llama, attention, alignment, rope, norm."""
