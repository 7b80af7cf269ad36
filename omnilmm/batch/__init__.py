"""Jobs of many requests that nobody waits for: line rules, job states, and a writer that loses and repeats nothing."""
