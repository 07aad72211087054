"""The same plan in other programs' words: plan file, Megatron-LM, torchtitan, DeepSpeed, vLLM."""
