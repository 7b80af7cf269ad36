"""Conversations to token ids and ids back to text. No pixel, no vector and no tensor is needed here.

vocabulary   what each id spells; control tokens and ordinary pieces
tokens       a checkpoint's tokenizer, from either kind of file
segments     a prompt as what the template says and what the client typed; encoding that cannot be forged
formats      the chat formats of plain text models, recognised and never executed
template     one class per family: turns to segments, the rules of placement
detokenize   ids to text, piece by piece, with stop strings
"""
