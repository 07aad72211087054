"""The upcycle job: a dense model directory in, a mixture of experts out, and a receipt of how equal they are."""
