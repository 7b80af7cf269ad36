"""Supervised tuning of either family, LoRA, and the synthetic scenes. Made from models/, never seen by what serves.

config       what a run's YAML file says, as frozen records
records      conversations with pictures from JSONL files
sequences    a conversation as token ids, with the places of what the assistant says
rows         sequences about the same pictures as one tree of tokens; batches of such rows
attend       attention over a batch of rows
sources      where rows come from, and in which order
learner      the models with their losses, and which of their parameters learn
lora         low-rank adapters for the fused projections, in peft's file format
grounding    an additional loss for scenes: what lies where in the picture
optimise     parameter groups, warm-up and cosine, clipping
workers      one worker or several
trainer      the loop
state        a run's state on disk, from which it resumes exactly
export       checkpoints in the official layout
curve        the run's log, its loss curve, and the bar on the screen
answers      greedy answers for many questions at once
evaluation   loss, accuracy by kind of question and language, shuffled pictures
tokenizer    a small tokenizer with the official special tokens
scenes, scenes_draw, scenes_words, scenes_ask, scenes_check   synthetic pictures with questions and answers
nano         the smallest checkpoints that see
"""
