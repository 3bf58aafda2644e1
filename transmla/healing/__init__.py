"""`transmla heal`: a short distillation from the source that brings a converted model back.

choice (settings: recipe.py) -> preparing (data, packing, teacher) -> student (maths/distillation.py) -> training
(optimizer) -> result (curves); the flow is flow.py.
"""
