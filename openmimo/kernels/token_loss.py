import torch
import torch.nn.functional as F


def token_logprobs(hidden_TD, weight_VD, labels_T, *, temperature=1.0):
    lp = F.log_softmax((hidden_TD @ weight_VD.T).float() / temperature, -1)
    out = lp.gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_T >= 0, out, torch.zeros_like(out))


def token_loss(hidden_TD, weight_VD, labels_T, weights_T):
    return -(token_logprobs(hidden_TD, weight_VD, labels_T) * weights_T).sum()


def token_argmax(hidden_TD, weight_VD):
    return (hidden_TD @ weight_VD.T).argmax(-1)
