"""The reasoner's role: a dialogue pack (`reasoner`) spoken through a model in process, an endpoint, or a script."""
