"""The two OmniLMM families and plain Llama-type models, in our own few modules.

fields       typed reading of a JSON object
config       what a checkpoint's config.json says, as frozen records
positions    rotary tables; position grids resampled to another size
layers       the norm and the two MLPs
attention    one signature for attention, its backends, and keys and values kept for one sequence
resampler    64 queries that read a picture
vision       the ViT of both families, and the image encoder: pixels in, vectors out
decoder      the language model, flat over tokens, blind to where keys live
merge        a whole prompt as embeddings, pictures in their places
beam         beam search as the originals do it
layout       every stored tensor's place in our parameters, both ways
checkpoint   folders, hub ids, shards
weights      filling the models from a checkpoint; the encoder's fingerprint
device       where the weights live and how many threads work on them
"""
