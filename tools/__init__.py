"""Commands: train, test, predict, export, models, info, benchmark; one thin file each."""
