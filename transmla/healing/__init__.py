"""`transmla heal`: a short distillation from the source that recovers the quality of a converted model.

flow.py runs the steps in this order:

    choice.py    which conversion is healed, with which settings, and what is refused early
    prepare.py   text packed into windows (windows.py), and the source's predictions for them (teacher.py)
    student.py   the converted model as a trainable model whose forward returns the loss
    schedule.py  how many steps, and how large
    train.py     transformers' Trainer, with some batches exchanged: on_policy.py has what the model wrote itself
    scores.py    what held-out windows say, and which state is the best;  pace.py: tokens per second
    result.py    the healed folder, verified, with its training curves (curves.py)
"""
