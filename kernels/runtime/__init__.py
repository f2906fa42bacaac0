"""What all operators share: the choice of implementation, registration, launches, mathematics."""
