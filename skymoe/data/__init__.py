"""Floor 3: tokens on disk and in order. numpy only, no torch.

    indexed      Megatron's .bin/.idx: writer, and a reader that trusts nothing
    permutation  a shuffle of n things that takes no memory (Feistel, cycle walking)
    interleave   which source comes next, so that weights hold at every prefix
    packing      from a place in the token stream to tokens, targets, positions, document ids
    sampler      the mixture: batch number -> batch, a pure function
    evaluation   every held-out token once, in order; bytes per token for bits per byte
    tokenizer    byte-level BPE: train, load, save; documents, splits: text files -> documents -> train | validation
    config, run  the job `skymoe data build`
    corpus       the text every Python carries: prose, docs, code; grammar, the same made up
"""
