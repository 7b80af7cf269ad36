"""The embedding cache: keys nobody can guess, values nobody can forge, and one encode per picture.

key      names of pictures and of their vectors, separate per scope
encoding vectors in fewer bytes, where the operator wants that and the vectors bear it
codec    a value as bytes: fixed header, raw numbers, MAC
memory   the byte-bounded tier of this process
breaker  when to stop asking a server that does not answer
address  which server, and how to sign in
link     the one function through which every exchange with Redis goes
redis    the tier all processes share
flight   who encodes what: leases, heartbeats, wake-ups
store    the tiers and the flights behind ports.EmbeddingStore
"""
