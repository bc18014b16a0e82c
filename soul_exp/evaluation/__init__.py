"""Measuring a model on a task.

- `probing`: the probes of a task: likelihoods and free answers.
- `lm_eval_suite`: general utility by lm-evaluation-harness; `lm_eval_model` is the model as the harness sees it.
- `records`: answers in files, ours and the evaluation logs of the TOFU authors.
"""
