"""Plans and their code in torch's cache: what they are kept under, what is kept, and where it lies."""
