"""Training of ReasonBrain in the engine of `loop.py`: its own parts, batches, steps and files, everything else shared.

base.py the parts that a run starts from, examples.py what is made of records and kept, source.py the batches of a stage,
unit.py the forward and the steps (eqs. A1, A2), assemble.py what is trained, room.py what is done around a stage, export.py
files for other programs.
"""
