"""What the commands that prepare data share. No module here is a command."""

OLMO_TOKENIZER = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"  # of OLMo-1B and 7B, inside olmo_eval
