"""Floor 3: tokens on disk and in order. numpy only, no torch.

- `layout`, `sidecar`, `indexed`: Megatron's .bin/.idx; a writer, and a reader that trusts nothing
- `permutation`: a shuffle of n things that takes no memory (Feistel, cycle walking)
- `interleave`: which source comes next, so that weights hold at every prefix
- `packing`: from places in the token stream to tokens, targets, positions, document ids
- `sampler`: the mixture: sample number -> sample, a pure function
- `evaluation`, `token_bytes`: every held-out token once, in order; bytes per token for bits per byte
- `documents`, `tokenizer`, `build`: text files -> documents -> tokens, training and validation apart
- `config`, `run`: the job `skymoe data build`
- `corpus`, `interpreter_text`, `grammar`: the text every Python carries (prose, docs, code), and the same made up
"""
