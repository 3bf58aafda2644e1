"""`transmla heal`: a short distillation from the source that brings a converted model back.

settings (recipe.py) -> data -> packing -> teacher -> student (maths/distillation.py) -> training -> curves; the flow is
flow.py.
"""
