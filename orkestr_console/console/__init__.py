"""Console pages that belong to no app: sign-in, account, people, limits, tokens, operator."""
