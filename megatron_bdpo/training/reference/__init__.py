"""The reference of a run: log-probs that are scored once and kept on disk, or a frozen model beside the policy.

provider            gets a run one or the other; on resume, always the original
fingerprint         what a reference is: the identity that decides whether log-probs on disk are its own
precomputed         which log-probs are on disk and which are missing
scoring_loop        scores what is missing, by the clock
passes              the forward passes of both: over groups of answers, or over a step's packs
cache               the directory of log-probs: format, readers, writers
weights             the model that scores: built, copied from the policy, saved, loaded
scoring_job         scoring as a job of its own: ``megatron-bdpo score``
options_from_data   what the log-probs decide: options of the loss, quartiles
"""
