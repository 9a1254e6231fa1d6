"""What is said to the MLLM and how its replies are read. Text only: pictures pass through as they are."""
