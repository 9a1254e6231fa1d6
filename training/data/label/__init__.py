"""`reasonedit-data`: pipelines that make records by asking an annotator. `runner.py` asks, `journal.py` remembers.

A pipeline is an async function of one item, which asks question after question and gives a draft of a record or raises
`Rejected`; `session.py` runs it over all items and writes what came of them. Every answer is in the journal before it is used,
so a run that was killed goes on where it was.

A further pipeline is a module with a class of the form `session.Pipeline`, a prompt file in prompts/ with its replies in
`prompts.REPLIES`, and a command: `_add_NAME` in `cli.py`, and what it means in `commands.JOBS`, from which workers of Ray
start as well.
"""
