"""The decode engine: many sequences, one model, keys and values in shared blocks.

Read in this order: `sequence` (one request's state), `blocks` (who holds which block), `plan` (one step on paper),
`scheduler` (who is paid), `runner` (the only one that touches the model), `engine` (choose, run, commit) and `loop`
(the thread that owns it all). Token ids in, token ids out; text belongs to the neighbours.
"""
