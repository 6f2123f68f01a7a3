"""All text that goes in, before it is tokens: the built-in corpus, outside sources, benchmarks."""
