"""Training of link tokens and adapters: what a model needs to answer from stored KV as well as from a full prefill."""
