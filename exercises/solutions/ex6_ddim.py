"""Exercise 6, solved.

Question: why do DDIM's digits hardly change, and when would you still use DDPM?
DDIM solves a differential equation (the probability flow), whose solution depends on the start only; more steps only
follow the same path more closely. The result of DDPM also depends on the fresh noise of every step. This noise replaces
a part of what earlier steps got wrong, while DDIM carries errors to the end (Karras et al., 2206.00364, section 4). So
DDPM is worth its steps if there are many of them. DDIM is for few steps, and for encoding an image.
"""
import common
from exercises.ex6_ddim import show


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = common.alpha_sigma(logsnr_t), common.alpha_sigma(logsnr_s)
    eps_hat = (z - alpha_t * x_hat) / sigma_t
    return alpha_s * x_hat + sigma_s * eps_hat


def predict(denoise, z, logsnr):
    alpha, sigma = common.alpha_sigma(logsnr)
    return alpha * z - sigma * denoise(z, logsnr.expand(len(z)))


def ddim(denoise, z, logsnrs, clip=True):
    for i in range(len(logsnrs) - 1):
        x_hat = predict(denoise, z, logsnrs[i:i + 1])
        if clip:
            x_hat = x_hat.clamp(-1, 1)
        z = ddim_step(z, x_hat, logsnrs[i:i + 1], logsnrs[i + 1:i + 2])
    return x_hat


def encode(denoise, x, logsnrs):
    z = x
    for i in range(len(logsnrs) - 1, 0, -1):
        z = ddim_step(z, predict(denoise, z, logsnrs[i:i + 1]), logsnrs[i:i + 1], logsnrs[i - 1:i])
    return z


if __name__ == "__main__":
    show(ddim)
