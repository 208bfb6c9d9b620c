"""What several test modules need: a tiny model, adapters that PEFT wrote, tasks."""
