"""The Llama with SSA attention on megatron-core's GPTModel. Reading order: llama, gpt, attention, alignment, mlp, norm."""
