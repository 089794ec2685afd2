"""From text to ids: training a small BPE, converting Llama 3's tokenizer, loading any tokenizer.json, encoding under a policy."""
