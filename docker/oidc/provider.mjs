// An OIDC provider for trying things out: anybody logs in as whoever they say they are. Never for production.
// ISSUER and REDIRECT_URI come from the environment; key, certificate and client secret from /certs (CERTS).
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer, get } from 'node:https';

const issuer = new URL(process.env.ISSUER ?? 'https://oidc.localhost:9443');
const certs = process.env.CERTS ?? '/certs';
const read = (name) => readFileSync(`${certs}/${name}`, 'utf8');

if (process.argv.includes('--healthy')) {
  const url = new URL('/.well-known/openid-configuration', `https://localhost:${issuer.port || 443}`);
  get(url, { ca: read('ca.pem') }, (reply) => process.exit(reply.statusCode === 200 ? 0 : 1))
    .on('error', () => process.exit(1));
} else {
  const { Provider } = await import('oidc-provider');
  const provider = new Provider(issuer.href.replace(/\/$/, ''), {
    clients: [{
      client_id: 'countersign',
      client_secret: read('secrets/oidc-client').trim(),
      redirect_uris: [process.env.REDIRECT_URI ?? 'https://broker.localhost:8444/login/callback'],
    }],
    claims: { openid: ['sub'], profile: ['name'], groups: ['groups'] },
    findAccount: (_ctx, id) => ({ accountId: id, claims: () => ({ sub: id, name: id, groups: ['reviewers'] }) }),
    features: { devInteractions: { enabled: true } },
    cookies: { keys: [randomBytes(32).toString('hex')] },
  });
  createServer({ key: read('oidc-key.pem'), cert: read('oidc.pem') }, provider.callback())
    .listen(Number(issuer.port || 443), () => console.log(`provider at ${issuer.href}`));
}
