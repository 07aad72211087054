"""The upcycle job: a dense model directory in, a mixture of experts out, with a receipt of how exactly it is the same."""
