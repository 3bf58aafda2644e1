"""`transmla heal`: a short distillation from the source that recovers the quality of a converted model.

flow.py runs the steps in this order:

    choice.py    which conversion is healed, with which settings, and what is refused early
    prepare.py   text packed into windows (windows.py), and the source's predictions for them (teacher.py)
    student.py   the converted model as a trainable model whose forward returns the loss
    train.py     transformers' Trainer
    result.py    the healed folder, verified, with its training curves (curves.py)
"""
