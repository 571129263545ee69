"""Several processes, one GPU each, make one video: what each of them holds, what they send, and who watches them."""
