"""What a request says in numbers: tokens, words, surprises, embeddings, parameters, traffic.

It detects nothing; `serve.drift.detector` takes the rows.
"""
