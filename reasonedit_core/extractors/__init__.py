"""Names of what an instruction is about, for the ID controller of ReasonBrain: said by a user, an MLLM, a parser or rules."""
