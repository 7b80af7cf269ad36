"""Supervised tuning of either family, LoRA, and the synthetic scenes. Made from models/, never seen by what serves.

run          a whole run from its settings: start or resume, train, export
config       what a run's YAML file says, as frozen records
records      conversations with pictures from JSONL files
sequences    a conversation as token ids, with the places of what the assistant says
rows         sequences about the same pictures as one tree of tokens; batches of such rows
attend       attention over a batch of rows
sources      where rows come from, and in which order
learner      the models with their losses, and which of their parameters learn
lora         low-rank adapters for the fused projections, in peft's file format
grounding    an additional loss for scenes: what lies where in the picture
optimise     AdamW and Muon, warm-up and cosine, clipping
trainer      the loop
workers      one worker or several
state        a run's state on disk, from which it resumes exactly
export       checkpoints in the official layout
curve        the run's log, its loss curve, and the bar on the screen
answers      greedy answers to many questions at once
evaluation   loss, accuracy by kind of question and language, shuffled pictures
sheets       what is mistaken for what, and a sheet of scenes with answers

scenes         what is in a synthetic picture, decided by its number
scenes_draw    the picture itself, and what lies in each of its cells
scenes_words   names in English and Chinese, and which of them a text uses
scenes_speech  how questions and answers are put
scenes_truth   what is so in a scene, and may be said of it
scenes_ask     conversations about a scene
scenes_check   whether an answer is right
scene_source   rows from scenes
tokenizer      a small tokenizer with the official special tokens
nano           the smallest checkpoints that see
recipes/       how they are trained
"""
