"""What several tests share: problems, models, files and checks."""
