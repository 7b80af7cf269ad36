"""The decode engine: many sequences, one model, keys and values in shared blocks. Token ids in, token ids out.

sequence     one request's state: tokens it has, tokens it owes, blocks it holds
pictures     where its pictures lie, and which of their vectors are here
blocks       who holds which block, and which contents can be found again
plan         one step on paper, and its result
fair_queue   who waits, and whose turn it is
scheduler    who is paid in the next step
admission    what a call must fulfil to enter
schema       a JSON schema as something that can be followed token by token
schema_probe a child process that tries a strange schema out
schema_check whether a schema may be compiled, and what the client is told if not
grammar      which tokens may come next in a structured answer
kv           the pool of keys and values
batch        a plan as tensors, and attention over it
philox       random numbers without state
sampling     from logits to a token
runner       the only one that touches the model
engine       choose, run, commit
stream       tokens on their way to one reader
inbox        what event loops tell the thread
loop         the thread that owns the engine
"""
