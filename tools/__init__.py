"""Commands: train, test, predict, export, models, info; one thin file each."""
