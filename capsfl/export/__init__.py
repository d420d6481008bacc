"""Models taken away from a study: weights, programs that need no capsfl, and a card that says what they are."""
