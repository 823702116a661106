"""A language model as annotator and judge, behind an OpenAI-compatible endpoint.

From a record to a label: `prompts` renders a template, `answers` may hold the answer already, else `client` asks the
endpoint; `schemas` checks the answer, `model` asks for a correction where it is wrong, `workers` does this for many
records at a time. `annotator` and `judge` are what the rest of the project sees.
"""
