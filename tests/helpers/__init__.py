"""What tests share: checkpoints, servers, browsers, processes that can be killed, references to compare with."""
