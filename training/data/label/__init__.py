"""`reasonedit-data`: pipelines that make records by asking an annotator. `runner.py` asks, `journal.py` remembers.

A pipeline is an async function of one item, which asks question after question and gives a draft of a record or raises
`Rejected`. Every answer is in the journal before it is used, so a run that was killed goes on where it was. A further pipeline
is a module with such a function, a prompt file, and a row in `pipelines.PIPELINES`.
"""
