"""Generation: what turns a prompt and its pictures into words, for one caller or many at once.

Deciding (sequence, kv_cache, scheduler, stops, detokenizer, engine) is plain Python without torch; computing (runner,
cpu_runner, sampler, kernels) stands behind the protocol in ``backend``, which tests and servers may replace.
"""
