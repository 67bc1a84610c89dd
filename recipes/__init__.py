"""What a user runs: LightningCLI scripts, their YAML configs, data, and reports."""
