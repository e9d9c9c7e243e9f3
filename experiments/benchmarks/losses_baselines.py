"""The losses in PyTorch as their authors compute them: the baselines of :mod:`experiments.benchmarks.losses`.

Rewritten from the authors' published code, with the same operations and so the same cost. Maps are NCHW; each function
returns the mean over the batch. Where no original in PyTorch is public, the function is written from the formula with
PyTorch's own functions and says so.
"""

import torch
from torch import Tensor
from torch.nn import functional as f


def soft_target_kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Hinton et al., in the form of RepDistiller."""
    log_p, q = f.log_softmax(student / temperature, 1), f.softmax(teacher / temperature, 1)
    return f.kl_div(log_p, q, reduction="sum") * temperature**2 / len(student)


def soft_target_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """From the formula."""
    log_p, q = f.log_softmax(student / 4, 1), f.softmax(teacher / 4, 1)
    return -(q * log_p).sum(1).mean() * 16


def squared_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """From the formula."""
    return f.mse_loss(student, teacher)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Zhao et al.: masks for target and other classes; 1000 is subtracted from the target in the second term."""
    t, place = 4.0, labels.unsqueeze(1)
    target = torch.zeros_like(student).scatter_(1, place, 1).bool()
    others = torch.ones_like(student).scatter_(1, place, 0).bool()

    def pair(p: Tensor) -> Tensor:
        return torch.cat([(p * target).sum(1, keepdim=True), (p * others).sum(1, keepdim=True)], 1)

    p, q = pair(f.softmax(student / t, 1)), pair(f.softmax(teacher / t, 1))
    of_target = f.kl_div(p.log(), q, reduction="sum") * t**2 / len(student)
    log_p, q = f.log_softmax(student / t - 1000 * target, 1), f.softmax(teacher / t - 1000 * target, 1)
    of_others = f.kl_div(log_p, q, reduction="sum") * t**2 / len(student)
    return of_target + 8 * of_others


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    """Huang et al.: cosines of centred rows, then of centred columns."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = f.softmax(student / 4, 1), f.softmax(teacher / 4, 1)
    return 16 * (1 - correlation(p, q)) + 16 * (1 - correlation(p.T, q.T))


def logit_standardised_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sun et al., times kdjax's T²."""

    def standard(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))

    log_p, q = f.log_softmax(standard(student) / 2, 1), f.softmax(standard(teacher) / 2, 1)
    return f.kl_div(log_p, q, reduction="none").sum(1).mean() * 4


def wttm(student: Tensor, teacher: Tensor) -> Tensor:
    """Zheng and Yang, at T = 5."""
    p = f.softmax(teacher, 1) ** 0.2
    weight = p.sum(1)
    each = f.kl_div(f.log_softmax(student, 1), p / weight[:, None], reduction="none").sum(1)
    return (weight * each).mean()


def confidence_penalty(student: Tensor) -> Tensor:
    """From the formula."""
    return (f.softmax(student, 1) * f.log_softmax(student, 1)).sum(1).mean()


def teacher_free_kl(student: Tensor, labels: Tensor) -> Tensor:
    """Yuan et al.'s formula; their code fills the virtual teacher in a loop over the batch, ours does not."""
    virtual = torch.full_like(student, 0.01 / (student.shape[1] - 1)).scatter_(1, labels.unsqueeze(1), 0.99)
    return soft_target_kl(student, virtual.log(), temperature=20.0)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """From the formula."""
    log_p, log_q = f.log_softmax(student / 4, 1), f.log_softmax(teacher / 4, 1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    both = f.kl_div(log_m, log_q, reduction="sum", log_target=True)
    both = both + f.kl_div(log_m, log_p, reduction="sum", log_target=True)
    return 8 * both / len(student)


def top_k_kl(student: Tensor, probabilities: Tensor, classes: Tensor) -> Tensor:
    """From the formula."""
    log_p = f.log_softmax(student / 4, 1).gather(1, classes)
    rest = (1 - log_p.exp().sum(1)).clamp(min=1e-12)
    residual = (1 - probabilities.sum(1)).clamp(min=1e-12)
    kept = f.kl_div(log_p, probabilities, reduction="none").sum(1)
    return 16 * (kept + residual * (residual.log() - rest.log())).mean()


def label_smoothing_cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own."""
    return f.cross_entropy(student, labels, label_smoothing=0.1)


def privileged(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Lopez-Paz et al., from the formula."""
    return 0.5 * f.cross_entropy(student, labels) + 0.5 * f.cross_entropy(student, f.softmax(teacher, 1))


def squared_error(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """From the formula."""
    return 0.5 * f.mse_loss(student, targets) + 0.5 * f.mse_loss(student, teacher)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Romero et al."""
    return f.mse_loss(student, teacher)


def _attention(x: Tensor) -> Tensor:
    return f.normalize(x.pow(2).mean(1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Zagoruyko and Komodakis."""
    return (_attention(student) - _attention(teacher)).pow(2).mean()


def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Kim et al., in the form of RepDistiller."""
    return (_attention(student) - _attention(teacher)).abs().mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Huang and Wang: every pair of channels multiplied at every position, summed afterwards."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()

    s, t = f.normalize(student.flatten(2), dim=2), f.normalize(teacher.flatten(2), dim=2)
    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)


def fsp(s_first: Tensor, s_second: Tensor, t_first: Tensor, t_second: Tensor) -> Tensor:
    """Yim et al., in the form of RepDistiller: the outer product at every position, averaged afterwards."""

    def flow(first: Tensor, second: Tensor) -> Tensor:
        return (first.unsqueeze(1).flatten(3) * second.unsqueeze(2).flatten(3)).mean(-1)

    return (flow(s_first, s_second) - flow(t_first, t_second)).pow(2).mean()


def activation_boundary(student: Tensor, teacher: Tensor) -> Tensor:
    """Heo et al., with margin 1."""
    up = (student + 1) ** 2 * ((student > -1) & (teacher <= 0)).float()
    down = (student - 1) ** 2 * ((student <= 1) & (teacher > 0)).float()
    return (up + down).abs().sum() / len(student)


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Heo et al."""
    teacher = torch.max(teacher, margin.view(1, -1, 1, 1))
    loss = f.mse_loss(student, teacher, reduction="none")
    return (loss * ((student > teacher) | (teacher > 0)).float()).sum() / len(student)


def reviewkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Chen et al."""
    loss, weight, total = f.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= student.shape[2]:
            continue
        weight /= 2
        s, t = (f.adaptive_avg_pool2d(x, (side, side)) for x in (student, teacher))
        loss, total = loss + weight * f.mse_loss(s, t), total + weight
    return loss / total


def vid(mean: Tensor, log_scale: Tensor, teacher: Tensor) -> Tensor:
    """Ahn et al., in the form of RepDistiller."""
    variance = (torch.log(1 + torch.exp(log_scale)) + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((mean - teacher) ** 2 / variance + torch.log(variance))).mean()


def mgd(generated: Tensor, teacher: Tensor) -> Tensor:
    """Yang et al."""
    return f.mse_loss(generated, teacher, reduction="sum") / len(generated)


def _pairwise(x: Tensor) -> Tensor:
    squares, diagonal = x.pow(2).sum(1), range(len(x))
    distance = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.T).clamp(min=1e-12).sqrt().clone()
    distance[diagonal, diagonal] = 0
    return distance


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Park et al."""
    with torch.no_grad():
        t = _pairwise(teacher)
        t = t / t[t > 0].mean()
    s = _pairwise(student)
    return f.smooth_l1_loss(s / s[s > 0].mean(), t)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Park et al.: all differences of two rows, scaled to unit norm, and their products at each anchor."""

    def cosines(x: Tensor) -> Tensor:
        apart = f.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return torch.bmm(apart, apart.transpose(1, 2)).view(-1)

    with torch.no_grad():
        t = cosines(teacher)
    return f.smooth_l1_loss(cosines(student), t)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Passalis and Tefas."""

    def near(x: Tensor) -> Tensor:
        x = x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-7)
        x[x != x] = 0
        cosines = (x @ x.T + 1) / 2
        return cosines / cosines.sum(1, keepdim=True)

    p, q = near(student), near(teacher)
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).mean()


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Tung and Mori, in the form of RepDistiller."""
    s, t = (f.normalize(x @ x.T) for x in (student.flatten(1), teacher.flatten(1)))
    apart = t - s
    return (apart * apart).sum() / len(student) ** 2


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """Peng et al., in the form of RepDistiller."""
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum(1).mean()


def _one_minus_pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - f.cosine_similarity(a, b, dim=1).mean()


def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Kim et al., from the formula."""
    return _one_minus_pearson(f.softmax(student, 1), f.softmax(teacher, 1))


def correlation_distance_ranks(student: Tensor, teacher: Tensor) -> Tensor:
    """The same with kdjax's smooth ranks, which take the difference of every pair of classes."""

    def ranks(z: Tensor) -> Tensor:
        return torch.tanh((z.unsqueeze(2) - z.unsqueeze(1)) / 2).sum(2)

    return correlation_distance(student, teacher) + _one_minus_pearson(ranks(student), ranks(teacher))


def info_nce(student: Tensor, teacher: Tensor) -> Tensor:
    """From the formula."""
    products = f.normalize(student) @ f.normalize(teacher).T
    return f.cross_entropy(products / 0.1, torch.arange(len(student)))


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Kornblith et al., from the formula with the kernels of the examples."""

    def kernel(x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x - x.mean(0, keepdim=True)
        return x @ x.T

    k, ell = kernel(student), kernel(teacher)
    return 1 - (k * ell).sum() / (k.norm() * ell.norm())


def crd(
    student: Tensor, teacher: Tensor, candidates: Tensor, s_bank: Tensor, t_bank: Tensor, z: Tensor
) -> Tensor:
    """Tian et al.: the candidates' rows are gathered from both memories, then updated; the first batch sets z."""
    batch, count = candidates.shape
    examples, width = s_bank.shape
    noise, scores = (count - 1) / examples, []
    for anchor, bank in ((student, t_bank), (teacher, s_bank)):
        rows = torch.index_select(bank, 0, candidates.view(-1)).detach().view(batch, count, width)
        scores.append(torch.exp(torch.bmm(rows, anchor.view(batch, width, 1)) / 0.07))
    if z[0] == 0:
        z.copy_(torch.stack([score.detach().mean() * examples for score in scores]))
    scores = [(score / constant.item()).contiguous() for score, constant in zip(scores, z, strict=True)]
    with torch.no_grad():
        visited = candidates[:, 0]
        for bank, embedding in ((s_bank, student), (t_bank, teacher)):
            row = torch.index_select(bank, 0, visited).mul_(0.5).add_(embedding * 0.5)
            bank.index_copy_(0, visited, row / row.pow(2).sum(1, keepdim=True).pow(0.5))
    losses = []
    for score in scores:
        positive, negative = score.select(1, 0), score.narrow(1, 1, count - 1)
        right = torch.div(positive, positive.add(noise + 1e-7)).log_()
        wrong = torch.div(negative.clone().fill_(noise), negative.add(noise + 1e-7)).log_()
        losses.append(-(right.sum(0) + wrong.view(-1, 1).sum(0)) / batch)
    return (losses[0] + losses[1]).sum()


def map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """From the formula; the larger map pooled to the smaller."""
    if student.shape != teacher.shape:
        side = round(teacher.shape[1] ** 0.5)
        square = student.view(len(student), 1, *2 * (round(student.shape[1] ** 0.5),))
        student = f.adaptive_avg_pool2d(square, (side, side)).flatten(1)
    return f.mse_loss(student, teacher)


def attribution_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of min-max maps, from the formula."""

    def scaled(x: Tensor) -> Tensor:
        x = x.abs().sum(1).flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    return f.mse_loss(scaled(student), scaled(teacher))


def gradient_match(student: Tensor, teacher: Tensor) -> Tensor:
    """Srinivas and Fleuret, from the formula."""
    s, t = f.normalize(student.flatten(1)), f.normalize(teacher.flatten(1))
    return (s - t).pow(2).sum(1).mean()


def dice(student: Tensor, target: Tensor) -> Tensor:
    """Milletari et al., from the formula."""
    p = f.softmax(student, 1)
    overlap = (p * target).sum((2, 3))
    total = (p**2).sum((2, 3)) + (target**2).sum((2, 3))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def lovasz(student: Tensor, labels: Tensor) -> Tensor:
    """Berman et al.: image by image and class by class, the errors sorted."""
    each = []
    for p, y in zip(f.softmax(student, 1), labels, strict=True):
        p, y, losses = p.permute(1, 2, 0).reshape(-1, p.shape[0]), y.view(-1), []
        for c in range(p.shape[1]):
            truth = (y == c).float()
            if truth.sum() == 0:
                continue
            error, order = torch.sort((truth - p[:, c]).abs(), 0, descending=True)
            truth = truth[order]
            union = truth.sum() + (1 - truth).cumsum(0)
            jaccard = 1 - (truth.sum() - truth.cumsum(0)) / union
            jaccard[1:] = jaccard[1:] - jaccard[:-1]
            losses.append(torch.dot(error, jaccard))
        each.append(torch.stack(losses).mean())
    return torch.stack(each).mean()
