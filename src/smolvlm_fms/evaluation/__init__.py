"""Held-out tests: how often a checkpoint is right, beside what it says to a grey picture.

    folder or bundle ─▶ suite (items: messages, right answers) ─▶ run (engine, batched; journal) ─▶ scoring ─▶ report

Every question is asked twice, once with its picture and once with a grey one of the same size: a model that knows the
answers without looking gets the same score both times.
"""
