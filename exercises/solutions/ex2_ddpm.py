"""Exercise 2, solved. With r = SNR(t) / SNR(s) these are the moments of common.ddpm_step() at interpolation 0.

Question: why not draw from q(z_s | x_hat)?
x_hat is the mean of all images that z_t can come from, not one of them. With much noise these differ a lot, and z_s
drawn around their mean is too narrow: it has lost what z_t says about which of them it is. The posterior keeps z_t with
the weight that it deserves, and adds noise only for what is unknown. Measured with sample() on N(0.3, 0.2^2) and 100
steps: the short cut gives the spread 0.14, in place of 0.20.
"""
from exercises.ex2_ddpm import alpha_sigma, show


def transition(logsnr_t, logsnr_s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    a = alpha_t / alpha_s                                               # the means: a alpha_s x = alpha_t x
    return a, sigma_t ** 2 - a ** 2 * sigma_s ** 2                      # the variances: a^2 sigma_s^2 + v = sigma_t^2


def posterior(z_t, x, logsnr_t, logsnr_s):
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    a, v = transition(logsnr_t, logsnr_s)
    variance = 1 / (a ** 2 / v + 1 / sigma_s ** 2)
    return variance * (a / v * z_t + alpha_s * x / sigma_s ** 2), variance


def step(z_t, x_hat, logsnr_t, logsnr_s, noise):
    mean, variance = posterior(z_t, x_hat, logsnr_t, logsnr_s)
    return mean + variance.sqrt() * noise


if __name__ == "__main__":
    show(step)
